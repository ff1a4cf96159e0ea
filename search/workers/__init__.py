"""What runs in a worker: one trial, its gradient steps, and the messages to the driver."""
