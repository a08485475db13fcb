"""From a backbone and labelled data to records: the plan of tasks, their data, their results."""
