"""The durable record of a study: storage, trial log, run folder, and the driver's lease."""
