"""A page for the relay's operator: tunnels, sessions, traffic and refusals. It is for reading, and for this host alone.

history    the last ten minutes, sampled from `Relay.stats`
report     what the page shows, as JSON
site       its pages, which `monitoring.site` serves
page       HTML, CSS and JavaScript; nothing is built, and nothing comes from elsewhere
"""
