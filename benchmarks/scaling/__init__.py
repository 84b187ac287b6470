"""What one relay process and one worker can take, and what a fleet of many nodes does: docs/scaling.md tells more."""
