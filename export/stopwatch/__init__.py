"""The parts of the stopwatch: cases, clocks, meters, foreign files."""
