"""The access log: a line for each HTTP request of a visitor, or for each stream where requests are not followed."""
