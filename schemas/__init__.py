"""What the data is: Arrow fields named once, reasons, the run config and the snapshot record."""
