"""Data that ships with Windtunnel; a regular package, so that no other `presets` is found first."""
