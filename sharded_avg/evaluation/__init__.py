"""What an evaluation of averaged weights needs beside them: BatchNorm statistics, finiteness, distance."""
