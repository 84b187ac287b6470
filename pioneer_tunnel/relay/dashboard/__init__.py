"""A page for the relay's operator: tunnels, sessions, traffic and refusals. It is for reading, and for this host alone.

address    where it listens: a loopback port, or a Unix socket
history    the last ten minutes, sampled from `Relay.stats`
report     what the page shows, as JSON
site       HTTP: the page, and the report
page       HTML, CSS and JavaScript; nothing is built, and nothing comes from elsewhere
"""
