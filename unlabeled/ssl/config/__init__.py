"""Settings: their base model, the schema of a run, composition from files and words, and messages about faults."""
