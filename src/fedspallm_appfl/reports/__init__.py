"""What people see of a run: progress, tables, the report, the model card."""
