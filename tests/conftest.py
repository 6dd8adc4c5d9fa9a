"""Puts the repository on the path, so that every room can `from tests.synth import write_contract_dir`."""
