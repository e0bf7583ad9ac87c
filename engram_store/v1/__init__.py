"""Messages and stubs of the wire, generated from `proto/` by `make proto`; never edited."""
