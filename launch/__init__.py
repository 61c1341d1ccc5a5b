"""Ways to start runs: the demo, and launchers for clusters."""
