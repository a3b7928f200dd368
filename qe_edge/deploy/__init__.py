"""From a model to engines and a report; every stage's output is a folder that the next one reads."""
