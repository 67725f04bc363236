"""What tests share: small bases and runs, closed forms, and the scripts that fill docs/ with what they measure."""
