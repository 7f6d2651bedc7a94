"""What an operator sees: logs, metrics and reports. Holds no decision of a flow."""
