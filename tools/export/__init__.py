"""``fleetune export``: turns a run's model file into what others run: ONNX, ONNX in int8, or adapters for PEFT."""
