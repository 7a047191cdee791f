"""Made-up tasks that ask what attention can do: copy, recall, select. Windows are generated, never stored."""
