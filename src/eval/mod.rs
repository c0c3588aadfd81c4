//! Evaluation: data sets, metrics, statistics, reports.
