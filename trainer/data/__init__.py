"""What the student learns on: captioned pictures, or prompts alone; both end as cached latents."""
