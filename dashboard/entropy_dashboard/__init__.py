"""The Streamlit dashboard: reads runs through `entropy_monitor.store`, and nothing else of ours."""
