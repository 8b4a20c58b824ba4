"""The folder that the specification requires; the code is in `ctxtrain/`."""
