"""`streamlit run dashboard/app.py` from a checkout; `.streamlit/config.toml` beside this file hardens the server."""

import sys
from pathlib import Path

if (root := str(Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.append(root)
__import__("entropy_dashboard.app").app.main()
