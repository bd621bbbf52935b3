"""Models from outside: loading by name, scoring rows, generating, quantised weights, guards at inference."""
