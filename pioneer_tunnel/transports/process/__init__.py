"""The transport `process`: an external tunnel program under supervision."""
