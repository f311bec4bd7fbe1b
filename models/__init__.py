"""What has weights or a noise process. Nothing here trains or reads a configuration file."""
