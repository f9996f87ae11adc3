"""What is flashed to a device: it trains adapters on a packed backbone and sends them to the aggregator.

Nothing below this package imports torch, transformers or optimum.
"""

import os

# From 1.29 on, ONNX Runtime's wheels give a device an id and report its sessions to their maker, unless this is set
# before the first import (docs/adr/0009). It stands here so that nothing of Fleetune imports the runtime earlier.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
