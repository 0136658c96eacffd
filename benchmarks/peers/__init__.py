"""The laws of training, asked of other libraries in an environment of their own."""
