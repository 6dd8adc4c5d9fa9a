"""The log of what people saw and did: contract, importers, store."""
