"""The folder that the specification names; the code is in `ctxtrain/`."""
