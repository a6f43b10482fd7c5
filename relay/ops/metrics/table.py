"""Every metric there is. Whatever shows metrics shows these: as `relay.ops.metrics.prometheus` and ``otlp`` do."""

from typing import Final

from relay.ops.metrics.metric import Metric
from relay.ops.metrics.service import HEALTH, PROCESS, REQUESTS
from relay.ops.metrics.traffic import IN_THE_KERNEL, LOSSES, RELAYING

TABLE: Final[tuple[Metric, ...]] = (*RELAYING, *REQUESTS, *LOSSES, *IN_THE_KERNEL, *HEALTH, *PROCESS)
