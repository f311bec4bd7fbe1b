"""How a student is judged: features, distances to a reference set, speed, and a report that states its protocol."""
