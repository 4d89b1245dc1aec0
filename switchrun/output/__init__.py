"""How answers, tables and progress look; the only place that uses rich, and only when it draws a table."""
