"""What the server runs: a script with no neighbours, so that Streamlit takes no `pages/` folder for its own."""

from entropy_dashboard.app import main

main()
