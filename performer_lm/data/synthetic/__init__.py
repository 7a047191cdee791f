"""Made-up tasks that test attention: copy, recall, select. Windows are generated, never stored."""
