"""Access rules for visitors: who may reach a service. A relay and a gateway check the same rules."""
