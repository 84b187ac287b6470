"""`relay --workers N`: a parent process and N workers, which serve the same addresses.

parent        supervises the workers: starts, replaces, reloads and ends them
crew          the workers of now, and what they say to each other through the parent
process       one worker, as the parent sees it
worker        the worker itself: it runs a `Relay`, as the parent says
others        the other workers, as a worker knows them
node          the directory that the workers of a relay without a fleet share
channel       calls between the two
sockets       the listening sockets, which outlive each worker
shares        what of the operator's limits each worker gets
reports       what all workers do, as the statistics of one relay
"""
