"""Students and teachers: loading them, and matching a teacher's labels to the task's."""
