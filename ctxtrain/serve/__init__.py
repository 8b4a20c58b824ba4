"""HTTP inference server. Its predictions equal those of `ctxtrain predict`."""
