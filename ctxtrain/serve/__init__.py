"""The inference server: HTTP requests in, predictions out, each as `ctxtrain predict` gives it."""
