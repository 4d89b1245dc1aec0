"""The model: built on the meta device, its dense weights placed, texts filled by a `Session`."""
