"""Below both passes and runtime: values, the wire schema, the portable ops, errors and configuration."""
