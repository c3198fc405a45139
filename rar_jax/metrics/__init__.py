"""Formulas over features and images: Frechet distance, Inception Score, precision and recall, KID, PSNR and SSIM."""
