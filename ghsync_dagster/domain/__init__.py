"""The rules of the trade: users, events, precedence and errors. Imports only the standard library and msgspec."""
