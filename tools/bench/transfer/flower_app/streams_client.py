"""A device that trains nothing, on a gRPC stream of Flower's older interface: run by Flower's interpreter."""

import sys

import numpy as np
from flwr.client import NumPyClient, start_client


class Client(NumPyClient):  # type: ignore[misc]
    """Sends the tensors back, each a little changed, as the other client does."""

    def __init__(self, own: float) -> None:
        self._own = np.float32(own)

    def fit(self, parameters, config):  # type: ignore[no-untyped-def]
        """Train nothing."""
        del config
        return [array + self._own for array in parameters], 1, {}


if __name__ == "__main__":
    start_client(server_address=sys.argv[1], client=Client(int(sys.argv[2]) / 997).to_client(), insecure=True)
