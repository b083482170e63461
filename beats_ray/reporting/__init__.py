"""The parts of the report: what a run folder holds, charts, and the sections of the page."""
