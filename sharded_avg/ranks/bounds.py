"""How long one rank waits for another, in seconds: none of these is torch's default, and none is for ever.

A process that needs others sets them before its first average: `sharded_avg.ranks.bounds.PATIENCE_S = 3600`, on all
ranks alike.
"""

PATIENCE_S = 1200.0  # for ranks that come to a collective method, or are at its local parts: others may still evaluate
LEAVING_GRACE_S = 30.0  # of a rank that leaves a swap with an error: the others may be stuck in what it never joined
TRAFFIC_S = 300.0  # for one message, when all ranks have said that they are ready
