"""The method as pure tensor functions: they know no model, no data, no file and no process group."""
