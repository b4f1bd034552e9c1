"""Platform backends: devices, memory, streams, graph capture."""
