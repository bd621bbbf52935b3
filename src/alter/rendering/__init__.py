"""Results made visible: tables in the terminal, figures, HTML; what every command that shows results draws with."""
