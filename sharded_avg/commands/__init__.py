"""The command line: sharded-avg."""
