"""What the stages share of Ray: a connection, tasks, slots, losses, spans and use of memory."""
